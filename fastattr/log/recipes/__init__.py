"""Scripts to copy: the logger inside a server, and its records inside other systems. See README.md."""
