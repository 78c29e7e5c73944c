"""The operations as Triton kernels: one file each, launcher first. Importing a file imports triton."""
