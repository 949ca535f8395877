"""POST /v1/completions: its body and reply, its rules, its route."""
