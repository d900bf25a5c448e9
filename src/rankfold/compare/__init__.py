"""A fair experiment: several methods on one model and one data set, at one budget, over learning rates and seeds."""
