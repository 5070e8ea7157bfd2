"""Makes data like OGBench's for its robot arm, with the scripted oracles that the package holds. Run from anywhere:

    python demos/make_ogbench.py --env cube-single-play-v0 --episodes 100 --seed 0 --out cube-single-play-v0.npz

Needs `pip install -r requirements-ogbench.txt`. In each episode the arm moves one cube, button, drawer or window after
the other to where chance wants it, along plans with smooth noise: play, of which OGBench's tasks are a small part. Its
own files have a thousand episodes or more, so a score over a file of this script is not one of OGBench's.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vqvae
from vqvae import UserError, check_numbers, exit_in_words, write_file


@dataclass
class Args:
    out: Path  # where to write the dataset, an .npz file
    env: str = "cube-single-play-v0"  # a dataset's name: cube-, scene- or puzzle-, each with play
    episodes: int = 100  # number of episodes
    steps: int = 1000  # transitions of each (OGBench: 1000)
    seed: int = 0  # episode i is drawn from seed + i


def make_env(name):
    """The environment of a dataset's name, with targets drawn at random, and an oracle for each kind of target."""
    if not (name.startswith(("cube-", "scene-", "puzzle-")) and name.endswith("-play-v0")):
        raise UserError(f"there is no plan for {name}: name play data of an arm, such as cube-single-play-v0.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a screen that is not there
        try:
            import ogbench  # noqa: F401, registers its environments
            from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan
        except ImportError as error:
            raise UserError(f"pip install -r requirements-ogbench.txt first: {error}.") from error
    options = dict(mode="data_collection", terminate_at_goal=False, visualize_info=False)
    try:
        env = gym.make(name.replace("-play", ""), disable_env_checker=True, **options).unwrapped
    except gym.error.Error as error:
        raise UserError(f"{name} cannot be made: {error}") from error
    return env, {
        "cube": cube_plan.CubePlanOracle(env),
        "button": button_plan.ButtonPlanOracle(env=env, gripper_always_closed=name.startswith("puzzle-")),
        "drawer": drawer_plan.DrawerPlanOracle(env),
        "window": window_plan.WindowPlanOracle(env),
    }


def record(env, oracles, steps, seed):
    """One episode: dict of arrays (steps + 1, ...), the last row being the state in which it ends, and how many targets
    were reached."""
    np.random.seed(seed)  # of the plans
    obs, info = env.reset(seed=seed)
    oracle, rows, reached = None, [], 0
    for _ in range(steps + 1):
        if oracle is None or oracle.done:
            if oracle is not None:
                reached += info["success"]
                obs, info = env.set_new_target()
            oracle = oracles[info["privileged/target_task"]]
            oracle.reset(obs, info)
        action = np.clip(oracle.select_action(obs, info), -1, 1)
        rows.append({"observations": obs, "actions": action})
        rows[-1] |= {key: info[key] for key in ("qpos", "qvel", "button_states") if key in info}
        obs, _, _, _, info = env.step(action)
    columns = {key: np.stack([row[key] for row in rows]).astype(np.float32) for key in rows[0]}
    return columns | {"terminals": np.arange(steps + 1) == steps}, reached


def main():
    args = tyro.cli(Args, description=__doc__)
    check_numbers(vars(args), episodes=(1, 1e6), steps=(1, 1e6), seed=(0, 2**31 - args.episodes))
    if args.out.suffix != ".npz":
        raise UserError(f"the dataset is an .npz file, not {args.out}.")
    env, oracles = make_env(args.env)
    seeds = tqdm(range(args.seed, args.seed + args.episodes), "episodes", dynamic_ncols=True)
    episodes, reached = zip(*(record(env, oracles, args.steps, seed) for seed in seeds), strict=True)
    dataset = {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0]}
    write_file(args.out, lambda file: np.savez_compressed(file, **dataset))
    print(f"{args.out}: {args.episodes} episodes of {args.steps} transitions; {sum(reached)} targets were reached")


if __name__ == "__main__":
    exit_in_words(main)
