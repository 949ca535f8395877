"""Which packed weights there are, by bits and groups. Data without torch, for whoever only checks what is asked for."""

SUPPORTED_BITS = (3, 4, 8)
# the group size that stands for K, one scale a row, where a model's K is not known yet: in recipes and configs
WHOLE_ROW = -1
