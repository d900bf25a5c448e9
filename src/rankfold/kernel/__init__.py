"""Torch alone: the algebra of an update, its forward and backward."""
