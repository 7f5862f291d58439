"""The adapter within other libraries, each in a package of its own that imports that library."""
