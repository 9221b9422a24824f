"""Files that data come from: which ones a source names, and the rows of JSON, CSV, Parquet and Arrow files."""
