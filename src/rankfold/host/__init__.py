"""What PEFT sees: one layer, one tuner, one config for all methods."""
