"""The commands of `fenceline`, a module per group; each has `declare`. `cloud.cli` puts them together."""
