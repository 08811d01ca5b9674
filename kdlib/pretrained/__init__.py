"""The pretrained model that students start from, and the vocabulary that it shares with the teachers."""
