"""Data-subset selection: SAGE, and the methods that it must be judged against."""
