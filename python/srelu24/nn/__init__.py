"""The FFN in models: modules, and finding, converting, profiling and warming up the FFNs that models have."""
