"""Which child for which budget: budgets, strategies, evaluation, the store, the report. Imports `supernet` and `deploy`."""
