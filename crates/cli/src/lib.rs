//! The command line of operators, and whole local clusters.
