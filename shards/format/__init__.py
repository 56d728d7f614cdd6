"""The file formats of a data set: tars, manifest.parquet, index.arrow, and the image files in the tars."""
