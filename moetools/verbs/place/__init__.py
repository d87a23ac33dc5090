"""`place-experts`: experts in an order that balances expert parallelism."""
