"""What the nodes of cluster.yaml may do on AWS: two roles with instance profiles, made once for an account.

    python deploy/aws_roles.py --bucket BUCKET [--bucket ANOTHER] [--delete]

ray-qa-worker   reads, writes and lists these buckets, and nothing else
ray-qa-head     that; and what Ray's autoscaler does: start, tag, look at and end machines, give workers their role,
                look up images

Run it with the credentials of somebody who may make roles. Again with other buckets, it replaces the earlier ones.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import boto3

HEAD, WORKER = "ray-qa-head", "ray-qa-worker"
_TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}


def bucket_policy(buckets: list[str]) -> list[dict[str, Any]]:
    """Statements for reading, writing and listing."""
    names = [f"arn:aws:s3:::{bucket}" for bucket in buckets]
    return [
        {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetBucketLocation"], "Resource": names},
        {
            "Effect": "Allow", "Resource": [f"{name}/*" for name in names],
            "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"],
        },
    ]


def autoscaler_policy(worker_role: str) -> list[dict[str, Any]]:
    """Statements for a head that starts and ends workers."""
    return [
        {
            "Effect": "Allow", "Resource": "*",
            "Action": [
                "ec2:RunInstances", "ec2:CreateTags", "ec2:DescribeInstances", "ec2:DescribeInstanceStatus",
                "ec2:DescribeInstanceTypes", "ec2:DescribeImages", "ec2:DescribeSubnets", "ec2:DescribeSecurityGroups",
                "ec2:DescribeKeyPairs", "ec2:DescribeAvailabilityZones",
            ],
        },
        {
            # Only machines that Ray made.
            "Effect": "Allow", "Resource": "*",
            "Action": ["ec2:TerminateInstances", "ec2:StopInstances", "ec2:StartInstances", "ec2:DeleteTags"],
            "Condition": {"StringLike": {"ec2:ResourceTag/ray-cluster-name": "*"}},
        },
        {"Effect": "Allow", "Action": "ssm:GetParameters", "Resource": "arn:aws:ssm:*::parameter/aws/service/*"},
        {"Effect": "Allow", "Action": "iam:PassRole", "Resource": worker_role},
    ]


def make(iam: Any, buckets: list[str]) -> None:
    """Make both roles, or bring them up to date."""
    shared = bucket_policy(buckets)
    worker = _make_role(iam, WORKER, shared)
    _make_role(iam, HEAD, shared + autoscaler_policy(worker))


def _make_role(iam: Any, name: str, statements: list[dict[str, Any]]) -> str:
    try:
        role = iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(_TRUST))
    except iam.exceptions.EntityAlreadyExistsException:
        role = iam.get_role(RoleName=name)
    document = {"Version": "2012-10-17", "Statement": statements}
    iam.put_role_policy(RoleName=name, PolicyName="ray-qa", PolicyDocument=json.dumps(document))
    try:
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    except iam.exceptions.EntityAlreadyExistsException:
        pass
    return str(role["Role"]["Arn"])


def delete(iam: Any) -> None:
    """Take both away."""
    for name in (HEAD, WORKER):
        iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=name)
        iam.delete_instance_profile(InstanceProfileName=name)
        iam.delete_role_policy(RoleName=name, PolicyName="ray-qa")
        iam.delete_role(RoleName=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket", action="append", help="a bucket that jobs read or write; several times for several")
    parser.add_argument("--delete", action="store_true", help="take the roles away again")
    told = parser.parse_args()
    iam = boto3.client("iam")
    if told.delete:
        delete(iam)
    elif told.bucket:
        make(iam, told.bucket)
        print(f"{HEAD} and {WORKER} may use {', '.join(told.bucket)}")
    else:
        parser.error("--bucket or --delete is needed")


if __name__ == "__main__":
    main()
