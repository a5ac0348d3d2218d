"""Tools that make data and tasks for the scripts beside this folder. The scripts import nothing from here, but
Gymnasium does for them: `gym.make("data.d4rl_tasks:antmaze-umaze-v2")`.

This file makes the folder a package: Python then prefers it to any plain folder called data, such as one where the
user stands. A real package of that name in front of it on the path fails loudly (no module named data.d4rl_tasks).
"""
