"""Agents: tools, environments with verifiable tasks, the episode loop, and the search agent.

tools, policies -> episode -> environments; summarizer, compressor -> search -> towns
"""
