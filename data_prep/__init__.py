"""From the data sets' own files to rows that can be trusted: converters, one row format, one checker."""
