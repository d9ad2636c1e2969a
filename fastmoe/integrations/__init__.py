"""fastmoe inside other libraries, one package each; nothing here is imported by `import fastmoe`."""
