"""Many runs with one aim: rivals compared, λ and t swept, Algorithm 1's trials."""
