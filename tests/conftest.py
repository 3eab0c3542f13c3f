"""Numbers of hypothesis's examples: few in the fast suite, many more in the slow one, the same at every run."""

from hypothesis import settings

fast = settings(deadline=None, derandomize=True, database=None, max_examples=50)
settings.register_profile("fast", fast)
settings.register_profile("slow", fast, max_examples=250)
settings.load_profile("fast")
