"""Reading a cache: single pictures, a data set for training, other programs' formats."""
