"""From data sets' own files to rows that can be trusted: converters, a row format, a checker."""
