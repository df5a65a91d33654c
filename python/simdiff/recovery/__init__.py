"""What a cut cost, brought back: corrections of the weights that stay, solved for or trained."""
