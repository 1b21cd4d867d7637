"""Read a cache: single images, a data set for training, and other programs' formats."""
