"""What lies on the disk: tars, manifest.parquet, index.arrow."""
