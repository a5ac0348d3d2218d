"""SAC (stable-baselines3's) on the environments, evaluation episodes and run folders of som_online.py, to compare.

Paper: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018, arXiv 1812.05905. stable-baselines3's
values: 2 x 256 units, batches of 256, learning rates 3e-4, tau 0.005, learned temperature. From som_online.py come the
environments side by side, one gradient step for a step of all of them (its --utd is 1 / --num-envs here) and 10,000
random first steps (stable-baselines3: one environment, 100). eval/ acts by the mean, the final eval_n1/ by a sample.
Resuming continues bit for bit; SIGINT, SIGTERM and SIGHUP save first, SIGKILL costs up to --checkpoint-interval steps.
"""
import json
import pathlib
import sys
import types
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import common  # noqa: E402

import mfql_offline  # noqa: E402
from mfql_offline import BadInput, blame  # noqa: E402

STEM = pathlib.Path(__file__).stem
COLUMNS = "observations", "next_observations", "actions", "rewards", "dones", "timeouts"


@dataclass
class Args(common.Args):
    env_id: str = "Hopper-v4"
    """Gymnasium environment with continuous actions"""
    total_timesteps: int = 1_000_000
    """environment steps, of all environments together"""
    num_envs: int = 5
    """environments that run side by side; one gradient step for a step of all of them"""
    learning_starts: int = 10_000
    """environment steps with uniformly random actions before the first gradient step"""
    buffer_size: int = 1_000_000
    """transitions in the replay buffer; the oldest give way"""
    learning_rate: float = 3e-4
    """Adam step size of the actor, the critics and the temperature"""


class Episodes(gym.Wrapper):
    """Each episode has its own seed, so that a resumed run can play the unfinished one again."""

    def __init__(self, env, *seed):
        super().__init__(env)
        self.seed, self.number, self.actions = seed, -1, []

    def reset(self, **kwargs):
        self.number, self.actions = self.number + 1, []
        return self.env.reset(seed=int(np.random.SeedSequence([*self.seed, self.number]).generate_state(1)[0]))

    def step(self, action):
        self.actions.append(torch.tensor(action))
        return self.env.step(action)

    def play_again(self, number, actions):
        self.number = number - 1
        observation = self.reset()[0]
        for action in actions:
            observation = self.step(action.numpy())[0]
        return observation


def main(argv=None):
    args, run_dir, checkpoint = common.parse(Args(), STEM, __doc__, argv)
    if checkpoint == "done":
        return 0
    if args.learning_starts >= args.total_timesteps:
        raise BadInput(f"--learning-starts must be below --total-timesteps {args.total_timesteps}, or nothing trains")
    try:
        import stable_baselines3
        from stable_baselines3.common.vec_env import DummyVecEnv
    except ImportError as error:
        raise BadInput(f"{error}; pip install stable-baselines3==2.9.2 gymnasium==1.4.0") from error
    device = common.prepare_torch(args)
    task = dict(env_id=args.env_id, kwargs={}, reference=None)
    with blame(f"--env-id {args.env_id}, --buffer-size {args.buffer_size}"):
        envs = [Episodes(mfql_offline.make_env(task), args.seed, i) for i in range(args.num_envs)]
        model = stable_baselines3.SAC(
            "MlpPolicy", DummyVecEnv([lambda env=env: env for env in envs]), args.learning_rate, gamma=args.gamma,
            buffer_size=min(args.buffer_size, args.total_timesteps + args.num_envs), tau=args.tau, train_freq=1,
            learning_starts=args.learning_starts, batch_size=args.batch_size, seed=args.seed % 2**32, device=device,
            policy_kwargs=dict(net_arch=[args.hidden_width] * 2))
    model.set_logger(stable_baselines3.common.logger.Logger(folder=None, output_formats=[]))  # else it writes files
    buffer, recorded = model.replay_buffer, model.logger.name_to_value
    if checkpoint:
        with blame(f"the checkpoint in {run_dir} does not fit"):
            state = checkpoint["state"]
            model.set_parameters(state["parameters"])
            model.log_ent_coef.data.copy_(state["log_ent_coef"])
            model.num_timesteps, model._n_updates = checkpoint["step"], state["updates"]
            buffer.pos, buffer.full = state["pos"], state["full"]
            for key in COLUMNS:
                getattr(buffer, key)[:len(state[key])] = state[key].numpy()
            np.random.set_state(json.loads(state["random_numpy"]))
            model.action_space.np_random.bit_generator.state = json.loads(state["random_actions"])
            model._last_obs = np.stack([env.play_again(*played) for env, played in zip(envs, state["running"])])
            if not np.array_equal(model._last_obs, state["last"].numpy()):
                raise BadInput("not deterministic: the unfinished episodes went another way this time")
    logged_updates = model._n_updates

    def advance(step):
        model.learn(args.num_envs, reset_num_timesteps=False, log_interval=None)  # one step of each environment
        return {key.replace("train/", "losses/"): float(value) for key, value in recorded.items()
                if key in ("train/actor_loss", "train/critic_loss", "train/ent_coef")}

    def charts(steps, seconds):
        nonlocal logged_updates
        updates, logged_updates = model._n_updates - logged_updates, model._n_updates
        return {"charts/SPS": steps / seconds, "charts/UPS": updates / seconds}

    def evaluate(interrupts, prefix):
        @torch.no_grad()
        def act(observations, _, generator):
            mean, log_std, _ = model.actor.get_action_dist_params(observations)
            noise = torch.randn(mean.shape, device=device, generator=generator) if prefix == "eval_n1/" else 0
            return torch.tanh(mean + log_std.exp() * noise)

        agent = types.SimpleNamespace(obs_mean=torch.zeros(1, device=device), act=act)
        return mfql_offline.evaluate(agent, task, args, 1, interrupts=interrupts)

    def state():
        filled = buffer.buffer_size if buffer.full else buffer.pos
        return dict(
            parameters=model.get_parameters(), log_ent_coef=model.log_ent_coef.detach(), updates=model._n_updates,
            pos=buffer.pos, full=buffer.full, **{key: torch.tensor(getattr(buffer, key)[:filled]) for key in COLUMNS},
            random_numpy=json.dumps(np.random.get_state(legacy=False), default=lambda array: array.tolist()),
            random_actions=json.dumps(model.action_space.np_random.bit_generator.state),
            running=[(env.number, env.actions) for env in envs], last=torch.tensor(model._last_obs))

    return common.train(STEM, args, run_dir, checkpoint, {}, device, args.total_timesteps, args.num_envs,
                        advance=advance, charts=charts, evaluate=evaluate, state=state)


if __name__ == "__main__":
    common.call(main, STEM)
