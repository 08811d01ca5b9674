"""Training targets: stored teacher outputs, weighted and combined into what a student is trained on."""
