"""Evaluation: what a model is asked, and what its answers are worth.

Tasks become questions before any rank starts (`questions`), the ranks answer them (`command`), and what they
answered is scored afterwards (`report` shows it): ranks know nothing of tasks, and tasks nothing of ranks.
"""
