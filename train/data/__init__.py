"""Files and formats, the scan of labels, and the order and pixels in which images are served."""
