/** Kept equal to package.json by the release check; read from no file, because a bundle has none. */
export const agentVersion = "0.1.0";
