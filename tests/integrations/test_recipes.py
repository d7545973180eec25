"""The recipes of the documentation: the Hugging Face Trainer, and PPO in one file as CleanRL writes it."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.distributions import Categorical
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import cbp_fast

PAGE = (Path(__file__).parents[2] / "docs" / "guide" / "frameworks.md").read_text()
(CODE,) = re.findall(r"\n\n(class ContinualBackpropCallback\(transformers.*?)```", PAGE, re.DOTALL)


def callback_of_the_page():
    """It, word for word but for rates by which something happens in a few steps."""
    names = {"transformers": transformers, "cbp_fast": cbp_fast, "torch": torch}
    exec(CODE.replace("seed=0", "seed=0, replacement_rate=0.01, maturity_threshold=3"), names)
    return names["ContinualBackpropCallback"]()


def bert(layers=2):
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=8, **sizes))


def test_hugging_face_trainer(tmp_path):
    torch.manual_seed(0)
    dataset = [{"input_ids": torch.randint(0, 50, (7,)), "labels": i % 2} for i in range(64)]

    def train(**options):
        torch.manual_seed(1)
        model = bert()
        args = TrainingArguments(
            str(tmp_path),
            max_steps=20,
            save_steps=10,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        callback = callback_of_the_page()
        Trainer(model, args, train_dataset=dataset, callbacks=[callback]).train(**options)
        return model, callback.cbp

    whole, cbp = train()
    assert all(age.max() == 20 for age in cbp.age.values())
    assert all(count > 2 for count in cbp.num_replaced.values())
    assert not any(module._forward_pre_hooks for module in whole.modules())
    resumed, again = train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert again.num_replaced == cbp.num_replaced
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


class Fails(transformers.TrainerCallback):
    """Ends the first train() in its second step."""

    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.mark.parametrize(
    "error", [None, KeyboardInterrupt(), ValueError("in the middle"), RuntimeError("CUDA out of memory.")], ids=repr
)
def test_hugging_face_trainer_goes_on_from_task_to_task(error, tmp_path):
    dataset = [{"input_ids": torch.randint(0, 50, (7,)), "labels": i % 2} for i in range(64)]
    model, callback, fails = bert(layers=1), callback_of_the_page(), Fails(error)
    memory = isinstance(error, RuntimeError)
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=8, auto_find_batch_size=memory, **options
    )
    ages = []
    for _ in range(3):
        with contextlib.suppress(KeyboardInterrupt, ValueError):
            Trainer(model, args, train_dataset=dataset, callbacks=[callback, fails]).train()
        ages.append(int(callback.cbp.age["mlp0"].max()))
    first = 4 if error is None else 6 if memory else 2
    assert ages == [first, first + 4, first + 8]
    assert callback.cbp.num_replaced["mlp0"] > 0
    assert not any(module._forward_pre_hooks for module in model.modules())


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        self.actor = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))

    def get_action_and_value(self, x, action=None):
        probabilities = Categorical(logits=self.actor(x))
        action = probabilities.sample() if action is None else action
        return action, probabilities.log_prob(action), probabilities.entropy(), self.critic(x).squeeze(-1)


class Balls:
    """Environments in which a push to the left or right is to keep a ball near the middle."""

    def __init__(self, num_envs):
        self.state = torch.zeros(num_envs, 2)

    def step(self, action):
        position, speed = self.state.unbind(1)
        speed = 0.9 * speed + 0.4 * (action.float() - 0.5) + 0.1 * torch.randn_like(speed)
        self.state = torch.stack([(position + speed).clamp(-2, 2), speed], 1)
        return self.observation(), -self.state[:, 0].abs()

    def observation(self):
        return torch.cat([self.state, self.state.square()], 1)


def test_ppo():
    torch.manual_seed(0)
    num_envs, num_steps, iterations, epochs, minibatches = 8, 32, 15, 4, 4
    gamma, lam, clip = 0.95, 0.95, 0.2
    agent, envs = Agent(), Balls(num_envs)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3, eps=1e-5)
    # the networks have a forward each, the agent has none; rollouts run under no_grad and are not observed
    options = {"replacement_rate": 1e-3, "maturity_threshold": 50}
    actor_cbp = cbp_fast.ContinualBackprop(agent.actor, optimizer, **options)
    critic_cbp = cbp_fast.ContinualBackprop(agent.critic, optimizer, **options)

    observations = torch.zeros(num_steps, num_envs, 4)
    actions, log_probs, rewards, values = (torch.zeros(num_steps, num_envs) for _ in range(4))
    observation, returns = envs.observation(), []
    for _ in range(iterations):
        for t in range(num_steps):
            observations[t] = observation
            with torch.no_grad():
                action, log_probs[t], _, values[t] = agent.get_action_and_value(observation)
            actions[t] = action
            observation, rewards[t] = envs.step(action)
        with torch.no_grad():
            next_value = agent.critic(observation).squeeze(-1)
            advantages, last = torch.zeros_like(rewards), 0.0
            for t in reversed(range(num_steps)):
                following = values[t + 1] if t + 1 < num_steps else next_value
                last = rewards[t] + gamma * following - values[t] + gamma * lam * last
                advantages[t] = last
            targets = advantages + values
        flat = [x.flatten(0, 1) for x in (observations, actions, log_probs, advantages, targets)]
        for _ in range(epochs):
            for batch in torch.randperm(num_steps * num_envs).chunk(minibatches):
                obs, act, old, advantage, target = (x[batch] for x in flat)
                _, new, entropy, value = agent.get_action_and_value(obs, act)
                ratio = (new - old).exp()
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                policy_loss = -torch.min(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
                loss = policy_loss - 0.01 * entropy.mean() + 0.5 * (value - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        returns.append(rewards.mean().item())

    steps = iterations * epochs * minibatches
    for cbp in (actor_cbp, critic_cbp):
        assert all(age.max() == steps for age in cbp.age.values())
        assert all(count > 1 for count in cbp.num_replaced.values())
    # it learns, units replaced or not
    assert sum(returns[-3:]) / 3 > returns[0] + 0.3
