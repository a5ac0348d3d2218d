"""D4RL's AntMaze, kitchen and Adroit and OGBench's single tasks as Gymnasium environments, without D4RL.

    gym.make("data.d4rl_tasks:antmaze-umaze-v2")      # or import data.d4rl_tasks, then gym.make("antmaze-umaze-v2")
    gym.spec("antmaze-umaze-v2").kwargs               # ref_min_score and ref_max_score as in D4RL, once imported

AntMaze needs MuJoCo alone. Kitchen and Adroit need `pip install gymnasium-robotics==1.4.2 mujoco==3.11.0`, OGBench's
tasks `pip install ogbench mujoco==3.11.0`; without them only making such a task fails, with gym.error.Error.
How close these are to D4RL: `tests/test_d4rl_tasks.py`, `benchmark/antmaze_policies.py`.
"""
import atexit
import contextlib
import importlib.metadata
import io
import pathlib
import weakref

import gymnasium as gym
import mujoco
import numpy as np

REFERENCE_SCORES = {  # D4RL's returns of a random and of an expert policy
    "hopper": (-20.272305, 3234.3), "halfcheetah": (-280.178953, 12135.0), "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7), "antmaze": (0.0, 1.0), "kitchen": (0.0, 4.0), "pen": (96.262799, 3076.8331017826877),
    "door": (-56.512833, 2880.5693087298737), "hammer": (-274.856578, 12794.134825156867),
    "relocate": (-6.425911, 4233.877797728884),
}
ANT_MAZES = {  # time limit, rows of 4 m cells: # wall, R start, G goal; play and diverse are two data sets of one task
    "umaze": (700, "##### #R..# ###.# #G..# #####"),
    "medium": (1000, "######## #R.##..# #..#...# ##...### #..#...# #.#..#.# #...#.G# ########"),
    "large": (1000, "############ #R...#.....# #.##.#.#.#.# #......#...# #.####.###.# #..#.#.....# ##.#.#.#.### "
                    "#..#...#.G.# ############"),
}


class AntMaze(gym.Env):
    """D4RL's AntMaze -v2: an ant walks through a maze to within 0.5 m of a goal that it is not told.

    Gymnasium's ant with D4RL's torque, time step and contacts: policies trained in D4RL's walk here as well as there
    (`benchmark/antmaze_policies.py`). Observation (29): qpos (x, y, z, quaternion w x y z, 8 joints) and qvel (14); x
    and y are 0 in the start cell, y grows with the map's row. Reward 1 and termination at the goal, else 0; falling
    ends nothing. A step takes 0.1 s. The reference scores are there for the spec alone.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (29,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (8,), np.float32)

    def __init__(self, maze, ref_min_score=None, ref_max_score=None, render_mode=None):
        self.render_mode, self.renderer = render_mode, None
        cells = np.array([list(row) for row in ANT_MAZES[maze][1].split()])
        centre = {mark: 4.0 * (np.argwhere(cells == mark)[:, ::-1] - 1) for mark in "#RG"}  # xy of the cells, m
        spec = mujoco.MjSpec.from_file(str(pathlib.Path(gym.__file__).parent / "envs/mujoco/assets/ant.xml"))
        for x, y in centre["#"]:
            spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=[x, y, 1], size=[2, 2, 1], contype=1,
                                    conaffinity=1, rgba=[0.6, 0.5, 0.4, 1])
        self.model = spec.compile()
        self.model.opt.timestep = 0.02  # s, gymnasium 0.01
        self.model.actuator_gear[:, 0] = 30  # N m at action 1, gymnasium 150
        self.model.geom_solimp[:, :3] = 0.8, 0.8, 0.01  # gymnasium 0.9 0.95 0.001
        self.data, self.goal_cell, self.middle = mujoco.MjData(self.model), centre["G"][0], centre["#"].mean(0)

    def observation(self):
        return np.concatenate([self.data.qpos, self.data.qvel])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal = self.goal_cell + self.np_random.uniform(0, 1, 2) + self.np_random.uniform(0, 0.5, 2)  # one-sided
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos += self.np_random.uniform(-0.1, 0.1, 15)
        self.data.qvel = 0.1 * self.np_random.standard_normal(14)
        mujoco.mj_normalizeQuat(self.model, self.data.qpos)  # as MuJoCo 2 did before the first observation
        mujoco.mj_forward(self.model, self.data)
        return self.observation(), {}

    def step(self, action):
        self.data.ctrl = action  # MuJoCo clips it to [-1, 1]
        mujoco.mj_step(self.model, self.data, nstep=5)
        success = bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= 0.5)
        return self.observation(), float(success), success, False, {"success": success}

    def render(self):
        """The maze from above, x to the right and y upwards; (480, 480, 3)."""
        self.renderer = self.renderer or mujoco.Renderer(self.model, 480, 480)
        camera = mujoco.MjvCamera()
        camera.lookat[:2], camera.distance, camera.azimuth, camera.elevation = self.middle, 60, 90, -90
        self.renderer.update_scene(self.data, camera)
        return self.renderer.render()

    def close(self):
        if self.renderer is not None:
            self.renderer.close()


def make_robotics(env_id, render_mode):
    """An environment of gymnasium-robotics without its time limit: ours is in our spec."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its note on Adroit's sign, which is repaired below
            import gymnasium_robotics
    except ImportError as error:
        raise gym.error.DependencyNotInstalled(
            f"{env_id}: {error}; pip install gymnasium-robotics==1.4.2 mujoco==3.11.0") from error
    gym.register_envs(gymnasium_robotics)
    return gym.make(env_id, render_mode=render_mode, max_episode_steps=-1,
                    disable_env_checker=True)  # it minds that kitchen's goal is the same object in every step


class Kitchen(gym.Wrapper):
    """D4RL's kitchen -v0 on gymnasium-robotics' FrankaKitchen-v1, whose physics are the same.

    Observation (60): qpos of the robot (9) and of the objects (21), both noisy, and the goal (30), which is 0 wherever
    the four subtasks ask for nothing. Reward: how many subtasks come within 0.3 of their goals in this step, each
    counted once; with the fourth the episode terminates. (D4RL's data reward a subtask in every step that it is done.)
    """

    def __init__(self, subtasks, ref_min_score=None, ref_max_score=None, render_mode=None):
        super().__init__(make_robotics("FrankaKitchen-v1", render_mode))
        from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES

        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (60,), np.float64)
        self.robot, self.goal = self.unwrapped.robot_env, np.zeros(30)
        self.subtasks = {name: OBS_ELEMENT_INDICES[name] for name in subtasks}  # where in the 30 numbers
        for name, index in self.subtasks.items():
            self.goal[index] = OBS_ELEMENT_GOALS[name]
        self.robot.robot_noise_ratio = 0.1  # of each joint's amplitude; it also disturbs the controller
        self.noise = 0.1 * np.append(self.robot.robot_pos_noise_amp[9:], 0.005)  # the robot lacks the last amplitude
        self.robot.model.geom_contype[1] = self.robot.model.geom_conaffinity[1] = 0  # D4RL's pedestal touches nothing

    def observe(self, robot):
        objects = self.robot.data.qpos[9:] + self.noise * self.robot.np_random.uniform(-1, 1, 21)
        return np.concatenate([robot["observation"][:9], objects, self.goal])

    def reset(self, *, seed=None, options=None):
        self.todo = set(self.subtasks)
        return self.observe(self.env.reset(seed=seed, options=options)[0]), {}

    def step(self, action):
        robot, _, _, truncated, _ = self.env.step(action)
        observation = self.observe(robot)
        error = observation[:30] - self.goal
        done = {name for name in self.todo if np.linalg.norm(error[self.subtasks[name]]) < 0.3}
        self.todo -= done
        return observation, float(len(done)), not self.todo, truncated, {}


class Adroit(gym.Wrapper):
    """Gymnasium-robotics' AdroitHand -v1 with two rules of D4RL: an episode of pen ends when the pen drops, and in the
    other tasks the distance from palm to object lowers the reward; releases 1.2.1 to 1.4.2 have that sign wrong."""

    def __init__(self, task, ref_min_score=None, ref_max_score=None, render_mode=None):
        super().__init__(make_robotics(f"AdroitHand{task.capitalize()}-v1", render_mode))
        self.task, version = task, importlib.metadata.version("gymnasium-robotics")
        if version != "1.4.2":  # another one may have the sign right already
            raise gym.error.DependencyNotInstalled(
                f"D4RL's {task} is rebuilt on gymnasium-robotics 1.4.2, not {version}: pip install "
                "gymnasium-robotics==1.4.2 mujoco==3.11.0")

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self.task == "pen":
            return observation, reward, bool(observation[26] < 0.075), truncated, info  # its height, m
        palm_to_object = {"door": observation[35:38], "hammer": observation[33:36] - observation[36:39],
                          "relocate": observation[30:33]}[self.task]  # m
        return observation, reward - 0.2 * np.linalg.norm(palm_to_object), terminated, truncated, info


class OGBenchTask(gym.Wrapper):
    """A single task of OGBench with the reward timing of the published scores: success is judged after the step. Its
    mazes draw their starts from NumPy's global generator: seeded here, so that episodes repeat. visual-... observe
    frames, (64, 64, 3) bytes, and need OpenGL: without a screen, set MUJOCO_GL=egl before MuJoCo is imported."""

    def __init__(self, name, render_mode=None):
        try:
            import ogbench
        except ImportError as error:
            raise gym.error.DependencyNotInstalled(f"{name}: {error}; pip install ogbench mujoco==3.11.0") from error
        super().__init__(ogbench.make_env_and_datasets(name, env_only=True, success_timing="post",
                                                       render_mode=render_mode, disable_env_checker=True))
        self.observation_space = self.env.observation_space  # OGBench's draws a frame whenever it is asked
        self.asked_mode, itself = render_mode, weakref.ref(self)
        atexit.register(lambda: itself() and itself().close())  # else renderers complain that MuJoCo ended first

    @property
    def render_mode(self):
        return self.asked_mode  # which OGBench's manipulation tasks forget

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            np.random.seed(seed % 2**32)
        return self.env.reset(seed=seed, options=options)

    def close(self):
        if getattr(self.unwrapped, "_renderer", None) is not None:  # OGBench leaves it open: 0.3 GB
            self.unwrapped._renderer.close()
        self.env.close()


def register(name, entry_point, max_episode_steps=None, /, **kwargs):
    scores = REFERENCE_SCORES.get(name.split("-")[0]) if entry_point is not OGBenchTask else None
    if scores:
        kwargs |= dict(zip(("ref_min_score", "ref_max_score"), scores))
    gym.register(name, f"{__name__}:{entry_point.__name__}", max_episode_steps=max_episode_steps, kwargs=kwargs)


for kind in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"):
    maze = kind.split("-")[0]
    register(f"antmaze-{kind}-v2", AntMaze, ANT_MAZES[maze][0], maze=maze)
for kind, last in (("complete", "slide cabinet"), ("partial", "slide cabinet"), ("mixed", "bottom burner")):
    register(f"kitchen-{kind}-v0", Kitchen, 280, subtasks=("microwave", "kettle", "light switch", last))
for task in ("pen", "door", "hammer", "relocate"):
    for kind in ("human", "cloned", "expert"):
        register(f"{task}-{kind}-v1", Adroit, 100 if task == "pen" else 200, task=task)  # gymnasium-robotics: all 200
for worlds, kinds in {  # OGBench's data sets; each has a default task and tasks 1 to 5
        "pointmaze-medium pointmaze-large pointmaze-giant pointmaze-teleport": "navigate stitch",
        "antmaze-medium antmaze-large antmaze-teleport": "navigate stitch explore",
        "antmaze-giant humanoidmaze-medium humanoidmaze-large humanoidmaze-giant": "navigate stitch",
        "antsoccer-arena antsoccer-medium": "navigate stitch",
        "cube-single cube-double cube-triple cube-quadruple": "play noisy",
        "scene puzzle-3x3 puzzle-4x4 puzzle-4x5 puzzle-4x6": "play noisy"}.items():
    for look in ("", "visual-"):
        for world in worlds.split():
            for kind in kinds.split():
                for task in ("", "-task1", "-task2", "-task3", "-task4", "-task5"):
                    name = f"{look}{world}-{kind}-singletask{task}-v0"
                    register(name, OGBenchTask, name=name)
