"""POST /v1/chat/completions: its body and reply, its rules, its route."""
