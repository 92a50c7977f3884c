"""The networks: their structure, initialisation and pretrained weights."""
