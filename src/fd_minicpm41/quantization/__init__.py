"""Low-bit weights: formats, files, the offline quantiser, and how FastDeploy serves them."""
