"""``python -m tcurlora_ext`` is the command ``tcurlora``."""

from tcurlora_ext.cli.app import main

if __name__ == "__main__":
    main()
