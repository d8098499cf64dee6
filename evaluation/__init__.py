"""SUPERB through s3prl, and its scores."""
