"""Speed, measured: each command prints ratios against a peer, from one run on one machine."""
