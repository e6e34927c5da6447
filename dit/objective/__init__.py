"""What should the network have said?"""
