"""What every part of the package uses: files, processes, tables, what the CPU has."""
