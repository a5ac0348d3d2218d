"""IQL (d3rlpy's) on the data, evaluation episodes and run folders of the offline scripts, for comparison.

Paper: Kostrikov, Nair, Levine, "Offline Reinforcement Learning with Implicit Q-Learning", ICLR 2022, arXiv 2110.06169.
Its values: expectile 0.7, beta 3, 2 x 256 units, batches of 256, learning rates 3e-4, a cosine to zero for the actor,
raw observations, rewards scaled by 1000 / (best - worst return) on locomotion; AntMaze has expectile 0.9, beta 10 and
rewards minus 1, Adroit and kitchen beta 0.5, but here without their dropout of 0.1. On other tasks the rewards stay as
they are. The mean action is the only candidate, so eval/ and the final eval_n1/ are the same.
Resuming continues bit for bit; SIGINT, SIGTERM and SIGHUP save first, SIGKILL costs up to --checkpoint-interval steps.
"""
import pathlib
import re
import sys
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import common  # noqa: E402
import offline  # noqa: E402

STEM = pathlib.Path(__file__).stem


@dataclass
class Args(offline.Args):
    expectile: float = 0.7
    """of the values' regression: larger is closer to the best action in the data"""
    inverse_temperature: float = 3.0
    """beta: larger weighs good actions more, smaller stays closer to the data"""
    learning_rate: float = 3e-4
    """Adam step size of the critics and peak of the actor's"""


def task_defaults(env_id):
    """The paper's values that differ per task."""
    if re.match(r"([\w.-]+/)?(hopper|halfcheetah|walker2d)[-/]", env_id.lower()):
        return dict(reward_scale=None)
    if env_id.startswith("antmaze"):
        return dict(expectile=0.9, inverse_temperature=10.0, reward_shift=-1.0)
    if re.match("(pen|door|hammer|relocate|kitchen)-", env_id):
        return dict(inverse_temperature=0.5)
    return {}


def create(d3rlpy, args, device):
    width = d3rlpy.models.VectorEncoderFactory([args.hidden_width] * 2)
    cosine = d3rlpy.optimizers.lr_schedulers.CosineAnnealingLRFactory(T_max=args.offline_steps)
    return d3rlpy.algos.IQLConfig(
        actor_learning_rate=args.learning_rate, critic_learning_rate=args.learning_rate, batch_size=args.batch_size,
        actor_optim_factory=d3rlpy.optimizers.AdamFactory(lr_scheduler_factory=cosine), gamma=args.gamma, tau=args.tau,
        actor_encoder_factory=width, critic_encoder_factory=width, value_encoder_factory=width,
        expectile=args.expectile, weight_temp=args.inverse_temperature,
    ).create(device)


def main(argv=None):
    return offline.main(STEM, __doc__, Args(), create, argv, task_defaults)


if __name__ == "__main__":
    common.call(main, STEM)
