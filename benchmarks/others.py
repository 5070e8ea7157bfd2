"""The updates of other implementations, at the sizes of speed.py, where they can be imported.

`d3rlpy`: pip install d3rlpy. `saq_official`: a checkout of jianlanluo/SAQ, with jax, flax, optax, distrax and
ml_collections installed. `corl`: a checkout of tinkoff-ai/CORL. Each function returns {update: function that takes one
gradient step}. What only their command lines need (gym, D4RL, trackers) is left out: nothing here runs it.
"""

import sys
from unittest.mock import MagicMock

import numpy as np

BATCH, ROWS = 256, 10_000


def leave_out(*modules):
    """Lets `import NAME` succeed where a package that a file imports, and no update needs, is not there."""
    for name in modules:
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = MagicMock()


def random_data(obs_dim, action_dim):
    rng = np.random.default_rng(0)
    return {
        "observations": rng.standard_normal((ROWS, obs_dim), np.float32),
        "actions": rng.uniform(-1, 1, (ROWS, action_dim)).astype(np.float32),
        "rewards": rng.random(ROWS, np.float32),
        "next_observations": rng.standard_normal((ROWS, obs_dim), np.float32),
        "dones": np.zeros(ROWS, np.float32),
    }


def d3rlpy_updates(obs_dim, action_dim, num_codes, device):
    import d3rlpy

    data, rng = random_data(obs_dim, action_dim), np.random.default_rng(0)
    encoder = {512: d3rlpy.models.VectorEncoderFactory([512, 512]), 256: d3rlpy.models.VectorEncoderFactory([256, 256])}
    kinds = {"saq_cql": d3rlpy.ActionSpace.DISCRETE, "cql": d3rlpy.ActionSpace.CONTINUOUS}
    updates = {}
    for update, kind in kinds.items():
        if update == "saq_cql":
            actions = rng.integers(num_codes, size=(ROWS, 1))
            config = d3rlpy.algos.DiscreteCQLConfig(batch_size=BATCH, encoder_factory=encoder[512])
        else:
            actions = data["actions"]
            factories = {"actor_encoder_factory": encoder[256], "critic_encoder_factory": encoder[256]}
            config = d3rlpy.algos.CQLConfig(batch_size=BATCH, **factories)
        timeouts, rewards = (np.arange(ROWS) % 1000 == 999).astype(np.float32), data["rewards"][:, None]
        columns = (data["observations"], actions, rewards, data["dones"], timeouts)
        dataset = d3rlpy.dataset.MDPDataset(*columns, action_space=kind)
        algo = config.create(device=f"{device.type}:0")
        algo.build_with_dataset(dataset)
        updates[update] = lambda algo=algo, dataset=dataset: algo.update(dataset.sample_transition_batch(BATCH))
    return updates


def saq_official_updates(folder, obs_dim, action_dim, num_codes):
    """The authors' quantizer, SAQ-CQL and continuous CQL; a batch is drawn in each step, as their loops do it."""
    sys.path.insert(0, str(folder))
    leave_out("gym", "d4rl", "wandb", "cloudpickle", "robomimic")
    import jax
    from vqn.conservative_sac import ConservativeSAC
    from vqn.jax_utils import init_rng
    from vqn.model import FullyConnectedQFunction, TanhGaussianPolicy
    from vqn.vqn import VQN

    init_rng(0)
    data, rng = random_data(obs_dim, action_dim), np.random.default_rng(0)
    vqn = VQN({"codebook_size": num_codes, "cql_min_q_weight": 10.0}, obs_dim, action_dim)
    policy, qf = TanhGaussianPolicy(obs_dim, action_dim), FullyConnectedQFunction(obs_dim, action_dim)
    settings = {"use_cql": True, "alpha_multiplier": 1.0, "use_automatic_entropy_tuning": True}
    cql = ConservativeSAC(settings | {"target_entropy": -float(action_dim)}, policy, qf)

    def step(train):
        def update():
            rows = rng.integers(ROWS, size=BATCH)
            jax.block_until_ready(train({key: column[rows] for key, column in data.items()}))

        return update

    return {"vqvae fit": step(vqn.train_vqvae), "saq_cql": step(vqn.train_dqn), "cql": step(cql.train)}


def corl_updates(folder, obs_dim, action_dim):
    """CORL's IQL, with its Gaussian policy."""
    sys.path.insert(0, str(folder / "algorithms" / "offline"))
    leave_out("gym", "d4rl", "wandb", "pyrallis")
    import torch
    from iql import GaussianPolicy, ImplicitQLearning, TwinQ, ValueFunction

    parts = {
        "actor": GaussianPolicy(obs_dim, action_dim, 1.0),
        "q_network": TwinQ(obs_dim, action_dim),
        "v_network": ValueFunction(obs_dim),
    }
    optimizers = {
        f"{name.split('_')[0]}_optimizer": torch.optim.Adam(part.parameters(), 3e-4) for name, part in parts.items()
    }
    learner = ImplicitQLearning(max_action=1.0, **parts, **optimizers)
    columns = [torch.as_tensor(column) for column in random_data(obs_dim, action_dim).values()]
    columns[2], columns[4] = columns[2][:, None], columns[4][:, None]

    def step():
        rows = torch.randint(ROWS, (BATCH,))
        learner.train([column[rows] for column in columns])

    return {"iql": step}
