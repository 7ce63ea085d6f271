"""What recipes share: the groups of their configs, and the objects these stand for."""
