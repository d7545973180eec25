"""The recipes of the README: the Hugging Face Trainer, and PPO in one file as CleanRL writes it."""

import os

import torch
from torch import nn
from torch.distributions import Categorical
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import cbp_fast


class ContinualBackpropCallback(TrainerCallback):
    """For `Trainer(callbacks=[...])`; in the checkpoints, too."""

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        groups = [
            cbp_fast.UnitGroup(f"mlp{i}", [layer.intermediate.dense], [layer.output.dense])
            for i, layer in enumerate(model.bert.encoder.layer)
        ]
        # the Trainer hands out accelerate's wrapper
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.cbp = cbp_fast.ContinualBackprop(
            model, optimizer, groups=groups, replacement_rate=0.01, maturity_threshold=3, seed=0
        )
        if os.path.exists(path := self.path(args, state)):
            self.cbp.load_state_dict(torch.load(path))

    def on_save(self, args, state, control, **kwargs):
        torch.save(self.cbp.state_dict(), self.path(args, state))

    def on_train_end(self, args, state, control, **kwargs):
        self.cbp.remove()

    def path(self, args, state):
        return f"{args.output_dir}/checkpoint-{state.global_step}/continual_backprop.pt"


def test_hugging_face_trainer(tmp_path):
    torch.manual_seed(0)
    dataset = [{"input_ids": torch.randint(0, 50, (7,)), "labels": i % 2} for i in range(64)]

    def train(**options):
        torch.manual_seed(1)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=8, **sizes))
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
        callback = ContinualBackpropCallback()
        Trainer(model, args, train_dataset=dataset, callbacks=[callback]).train(**options)
        return model, callback.cbp

    whole, cbp = train()
    assert all(age.max() == 20 for age in cbp.age.values())
    assert all(count > 2 for count in cbp.num_replaced.values())
    assert not any(module._forward_pre_hooks for module in whole.modules())
    resumed, again = train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert again.num_replaced == cbp.num_replaced
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


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
