"""`tcurlora evaluate`: scores of every case and label, of runs and of folders of label maps."""
