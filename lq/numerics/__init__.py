"""One tensor, no graph: grids, statistics, ranges, the quantizer."""
