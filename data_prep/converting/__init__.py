"""What all converters share: command line, reading, rows, orders, writing."""
