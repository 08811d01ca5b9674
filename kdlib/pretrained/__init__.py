"""The pretrained model that students start from, and the token inventory that it shares with the teachers."""
