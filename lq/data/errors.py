"""What is raised where a data set is not there."""


class DatasetNotFoundError(FileNotFoundError):
    """A data set is not where it was looked for, and could not be downloaded if that was asked for."""
