"""The bundled model `shapes`, the scenes it describes, and the script that trains it."""
